"""`python -m slimtune`."""
from slimtune.cli.main import main

if __name__ == "__main__":
    main()

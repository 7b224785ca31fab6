"""The command line: one file a verb. It parses, calls, prints; everything it does can be called from Python."""

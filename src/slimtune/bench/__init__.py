"""Suites: methods x seeds on real data, each run in a process of its own."""

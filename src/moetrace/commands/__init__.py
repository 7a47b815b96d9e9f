"""What the `moetrace` command does with files and stores; `moetrace.cli` is its entry point."""

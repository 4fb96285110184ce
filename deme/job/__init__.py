"""What any long job needs: a command line, locks, signals, files, records, processes."""

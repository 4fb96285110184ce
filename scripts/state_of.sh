#!/usr/bin/env bash
# Print a hash of files, and of all files in folders, whose paths are the lines of standard input. It covers each file's
# path, size, inode and time of last change (ctime): every write sets that, and no program can set it back, unlike mtime.
set -euo pipefail
xargs -r -d '\n' sh -c 'find -L "$@" -type f -printf "%p %s %i %C@\n" 2>/dev/null || :' sh | LC_ALL=C sort | sha256sum |
  cut -d ' ' -f 1

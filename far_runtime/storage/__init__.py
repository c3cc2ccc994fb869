"""Files and folders that appear whole or not at all, records of runs, and locks."""

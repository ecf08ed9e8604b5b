"""The command line and what stands behind it: runs, their files, the text, the baseline."""

"""Files: folders that are written completely or not at all, and untrusted files that are read within limits."""

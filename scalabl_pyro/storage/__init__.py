"""Files: directories written whole, and untrusted files read within limits."""

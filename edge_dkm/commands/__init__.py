"""What a MES may ask of a running line: reading it, doing it once, answering it, and what of it survives a restart."""

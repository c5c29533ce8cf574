"""Records of runs become tables, Markdown and HTML. Imports no torch and never opens a checkpoint."""

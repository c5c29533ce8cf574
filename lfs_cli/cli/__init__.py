"""How people call lfs: six thin faces that parse, call and show. They own stdout, stderr and the exit code."""

"""`far sample`: many pictures in sharded files, drawn here or by workers on Ray."""

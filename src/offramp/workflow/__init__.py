"""Work of the commands, callable from Python: nothing here prints or reads options."""

"""What the command line does for each network: a file a network, a class a command.

A class's fields are the command's flags, its docstrings their help, and calling it runs it.
"""

"""The ``bond`` command. Importing it imports neither torch nor the host."""

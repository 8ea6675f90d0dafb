"""What would it cost? Drawn and computed without a process group. Nobody imports this room but the command line."""

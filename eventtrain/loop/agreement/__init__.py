"""How the processes of one run agree on decisions: process 0 makes them, the others follow its log."""

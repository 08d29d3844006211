"""What the processes of a run leave behind so that a fault can be named: beats, notes, hang dumps, diagnoses."""

"""What makes and keeps `runs/`: sessions, jobs and the execution of notebooks."""

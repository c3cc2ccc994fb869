"""The sampling loops, their settings and schedules, solvers and noise."""

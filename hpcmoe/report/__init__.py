"""What is shown: metrics of steps, the meter that gathers them, progress, tables and figures."""

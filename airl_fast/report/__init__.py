"""One HTML file that shows runs: curves, figures with their intervals, and traces with a value on every token."""

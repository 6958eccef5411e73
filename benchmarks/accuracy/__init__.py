"""Scores against labels, over seeds."""

"""Kinds of parts that keep appearing among the novel ones, proposed as new clusters."""

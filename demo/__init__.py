"""The demo: two films of a drawn conveyor, one to learn from and one to be judged on, through the whole line."""

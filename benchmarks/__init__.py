"""Side-by-side measurements. Each script prints one table from one run: `python -m benchmarks.accuracy.x_sdd`. None of them is a test."""

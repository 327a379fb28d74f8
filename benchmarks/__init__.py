"""Studies of what the package is worth: `python -m benchmarks` lists them, results/ has what they gave."""

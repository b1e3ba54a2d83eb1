"""Generation: settings, random bits, sampling rules and the loop, specified once in NumPy."""

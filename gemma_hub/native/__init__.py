"""C++ that backends share, compiled on the user's machine for its processor when it is asked for."""

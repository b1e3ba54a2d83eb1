"""C++ that backends share, compiled for the user's processor when it is asked for."""

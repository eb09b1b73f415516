"""One pure function per equation; computed in single precision at least, whatever comes in."""

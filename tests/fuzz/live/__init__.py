"""A real cluster on loopback that is served with hostile input at every port that it listens on."""

"""What `tandem doctor` looks at: this machine, the nodes of an engine, the engines of a router."""

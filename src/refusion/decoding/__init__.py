"""The algorithm, once: which tokens win, against any network that can run a forward."""

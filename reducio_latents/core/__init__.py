"""Ideas that need no file and no model: settings, clips, sizes, Gaussians, fingerprints."""

"""What the scripts of build time run."""

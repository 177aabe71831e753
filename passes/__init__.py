"""The pass library: one published method or one idea a file, written on graphprune's public names alone."""

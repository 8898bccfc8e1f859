"""The merge methods as mergekit sees them, a file each; `base` is what they share. All arithmetic of wp is in
`kernel`."""

// Package watch tells when a file may have changed: one that is written in
// place, replaced by a rename, or led to by symbolic links that are swapped, as
// those of a Kubernetes ConfigMap are. The file need not exist.
package watch

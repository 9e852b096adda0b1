// Package file finds endpoints in a file that is watched. The file has the format
// of Prometheus's file_sd, or that of the endpoints in the configuration.
package file

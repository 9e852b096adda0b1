// Package pods runs the real binary in pods: cgroup trees as runtimes make them,
// with real processes, and no runtime.
package pods

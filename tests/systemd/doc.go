// Package systemd runs the shipped unit and drop-in under a real systemd: PID 1 of
// a container on pure cgroup v2, with a network of its own, beside a service whose
// connections are captured.
package systemd

// Bench measures what a hop through Pillion costs, beside HAProxy and nginx.
//
// All arms run in one network namespace of the benchmark's own, and take turns
// in short rounds: what else the machine does then hits all of them, and the
// median of the rounds' ratios says more than any single figure. What counts is
// the processor time of the proxy per unit of work, as the scheduler has it;
// times on the wall drift by a factor of two on virtual machines.
//
// It is make bench. docs/performance.md has what it found.
package main

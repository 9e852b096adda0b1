// Bench measures what a hop through Pillion costs, beside HAProxy and nginx, and
// what no hop costs, beside nothing at all and translated addresses.
//
// All arms of part relay run in one network namespace of the benchmark's own, and take turns
// in short rounds: what else the machine does then hits all of them, and the
// median of the rounds' ratios says more than any single figure. What counts is
// the processor time of the proxy per unit of work, as the scheduler has it;
// times on the wall drift by a factor of two on virtual machines.
//
// Where no process carries the bytes, there is none whose time would count. So in
// part direct it is the whole machine's: what spinners of lowest priority, one per
// processor, do not get. Server and client keep to a processor each there, and each
// arm has a network namespace of its own, one pair of interfaces away from the
// server's, since what one installs would slow down all of a namespace.
//
// It is make bench. docs/performance.md has what it found.
package main

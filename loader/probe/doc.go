// Package probe tells whether this machine can run Pillion, what it will do
// differently here, and what to change. `pillion doctor` prints all of it
// ([Run]); the loader asks for the quick part before it loads ([Required]).
//
// Nothing stays behind: programs and maps are closed, the one cgroup is
// removed, rules and routes are only read. Features are probed by loading a
// program that uses them, never by comparing versions, since vendors backport.
package probe

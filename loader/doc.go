// Package loader stands between the kernel side and the process. It claims the
// slots of an instance, loads and attaches the programs, keeps their maps in
// step with the configuration and with the namespace, and takes everything away
// again.
//
// The life of an instance has four verbs. [Create] makes it, [Open] finds one
// that an earlier process made, [Datapath.Close] lets go of it and leaves it
// working, [Datapath.Unload] and [Remove] end it. Everything is pinned below
// one directory, which whoever runs the instance holds locked.
package loader

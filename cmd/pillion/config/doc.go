// Package config is what the user asks of Pillion: a YAML file and the forms of
// it that fit into a flag.
//
// Reading is strict. An unknown key, a value of the wrong kind and a name where
// an address belongs are errors, each with its place and what was meant, and
// all of them are in one error, so that one run finds them all. A [Config] that
// [Load] or [Parse] returns has passed [Config.Validate]; whoever changes it
// afterwards validates it again.
package config

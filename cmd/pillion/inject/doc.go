// Package inject puts Pillion beside the containers of a pod: in a manifest's
// text, of which everything else stays byte for byte, or as the JSON patch of an
// admission webhook. Both come from the same list of edits.
package inject

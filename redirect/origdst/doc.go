// Package origdst tells where a captured connection was going.
package origdst

// Package capture proves, all the time, that captured connections arrive: it
// connects to itself by the way that they come, and publishes the outcome as
// the handler's sign of life, which the connect hook goes by.
package capture

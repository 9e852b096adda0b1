// Package spelling reads what people write into configurations and files of endpoints,
// and says what they have meant, or what to write instead.
package spelling

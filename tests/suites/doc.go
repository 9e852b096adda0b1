// Package suites runs what other projects test their own clients and servers
// with, once as it is and once with Pillion in between, and wants to see no
// difference. docs/suites.md tells what is run and what came out.
//
// What is short runs with every other test. PILLION_SUITES=long, which make
// suites sets, has everything run in full.
package suites

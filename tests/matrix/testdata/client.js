// Connections as Node makes them: [METHOD HOST PORT]...; there is one method.
// A host with commas is a name with these addresses. Random bytes are echoed over
// each connection; what it saw is a line of JSON.
'use strict'
const net = require('net')
const crypto = require('crypto')

function connect (host, port) {
  const addresses = host.split(',').map((a) => ({ address: a, family: net.isIP(a) }))
  const options = { host, port, allowHalfOpen: true }
  if (addresses.length > 1) {
    options.host = 'a.test'
    options.lookup = (name, how, done) => done(null, addresses)
    options.autoSelectFamily = true
    options.autoSelectFamilyAttemptTimeout = 2000
  }
  return new Promise((resolve, reject) => {
    const data = crypto.randomBytes(150001)
    const parts = []
    const s = net.connect(options, () => {
      const seen = {
        to: host, peer: s.remoteAddress, peer_port: s.remotePort, own: s.localAddress, own_port: s.localPort
      }
      s.end(data)
      s.on('data', (b) => parts.push(b))
      s.on('end', () => {
        const got = Buffer.concat(parts)
        resolve({ ...seen, sent: data.length, got: got.length, same: got.equals(data) })
      })
    })
    s.setTimeout(20000, () => s.destroy(new Error('timeout')))
    s.on('error', reject)
  })
}

async function main (args) {
  for (let i = 0; i < args.length; i += 3) {
    console.log(JSON.stringify(await connect(args[i + 1], Number(args[i + 2]))))
  }
}

main(process.argv.slice(2)).catch((err) => { console.error(err); process.exit(1) })

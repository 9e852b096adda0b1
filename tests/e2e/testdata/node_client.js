// HTTP as Node makes it: a site on port 8080.
'use strict'
const http = require('http')
const crypto = require('crypto')
const assert = require('assert')

const hash = (data) => crypto.createHash('sha256').update(data).digest('hex')

function request (agent, path, method, body) {
  return new Promise((resolve, reject) => {
    const req = http.request({ host: '198.51.100.7', port: 8080, agent, path, method }, (res) => {
      const h = crypto.createHash('sha256')
      const from = res.socket.localPort
      let n = 0
      let text = ''
      res.on('data', (b) => { n += b.length; h.update(b); if (n < 1000) text += b })
      res.on('end', () => resolve({ status: res.statusCode, n, hash: h.digest('hex'), text, from }))
      res.on('error', reject)
    })
    req.setTimeout(30000, () => req.destroy(new Error('timeout')))
    req.on('error', reject)
    req.end(body)
  })
}

async function main () {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 5 })
  const body = Buffer.alloc(1 << 20, 'a body ')
  const many = await Promise.all(Array.from({ length: 50 }, () => request(agent, '/sum', 'POST', body)))
  const good = many.filter((r) => r.status === 200 && r.text === `POST ${body.length} ${hash(body)}\n`)
  console.log('http', good.length, 'of', many.length, 'over', new Set(many.map((r) => r.from)).size)
  const big = await request(agent, '/big?n=50000000', 'GET')
  assert.strictEqual(big.status, 200)
  console.log('big', big.n, big.hash)
  agent.destroy()
}

main().catch((err) => { console.error(err); process.exit(1) })
